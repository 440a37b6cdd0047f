"""The operating system, from ordinary Python: libc, system call numbers, /proc, signals, seccomp and Landlock."""
