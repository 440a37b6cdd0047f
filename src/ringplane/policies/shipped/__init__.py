"""The policies that ship, a file each. They are read as the files of users are, and never imported."""
