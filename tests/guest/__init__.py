"""Real Linux guests, in QEMU and in user-mode Linux, that use a ringplane disk."""
