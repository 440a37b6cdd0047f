"""In-flight tracking: requests that a process has fetched are known to the next one if it ends.

`area` is the memory that the front end keeps for that, `tracking` what compiled code stores there, `recover` what the
next process reads.
"""
