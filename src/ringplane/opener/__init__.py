"""How files are opened: by this process, or, once it has given up the right to, by a small process beside it.

The small process, `opening_process.py`, is started before the sandbox closes. It opens and creates images and makes
sockets, only below folders that were named at the start, connects to servers that were named at the start, and hands
over file descriptors. Neither process trusts the other one: this one may be controlled by a guest some day, and the
other one reads paths from it.

    opener.py             what opens files: `Opener`, and `LOCAL`, which is this process itself
    remote_opener.py      this end of the small process
    exchange.py           its requests and answers
    open_requests.py      the messages between the two
    opening_process.py    the small process: its start, and its loop
    allowed_folders.py    what it does below the folders
    server_places.py      where the servers are, and connecting to them
    host_names.py         looking up their names, before that, in another process
    opening_sandbox.py    what it gives up

Beside it another one compiles policies, which the first one starts:

    remote_compiler.py      our end
    compile_requests.py     the messages between the two
    compiling_process.py    the process, and its children that compile
    compiling_sandbox.py    what they give up

The small process imports only `system/` and Python's own modules, and few of them: each costs memory. The folders have
tests in unit/test_opener.py and hostile/test_opening_process.py.
"""
