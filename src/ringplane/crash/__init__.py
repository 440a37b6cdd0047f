"""The laboratory for power cuts: tries what a power cut would have been allowed to leave of a recorded disk.

`timeline` says which writes of a recording are stable when, `power_cuts` which ones can be missing, `crash_states` in
which combinations, most likely ones first, with `tearing` and `landing` for parts of writes and their order.
`sector_contents` and `disk_state` have the content of a disk in such a state without copying it, and its fingerprint.
`image_view` and `mounted_view` show it as a file, `check_process` runs the check on it, and `check_command` the
command of that. `check_processes` and `laboratory` keep all CPUs busy with that, `smallest_state` makes a failing state
smaller, and `crash_report` and `failing_recording` have what was found.
"""
