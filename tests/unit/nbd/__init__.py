"""The source `nbd` with a server in Python (nbd_server.py); tests/storage has real ones."""
