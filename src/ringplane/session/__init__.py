"""The session with a front end: what its messages do to the disk.

`session.py` takes the messages of one front end from the transport and answers them; `handlers.py` has a method for
each kind. `negotiation.py` is the state of features and status, `front_end_memory.py` the memory that the front end
shares, `vring.py` one ring, `config_space.py` the part of the configuration space that drivers read and write.
`refusal.py` says how a message is rejected, `inband.py` is the channel back to the front end, and `snapshot.py` what a
planned restart hands over.
"""
