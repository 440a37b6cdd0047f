"""The vhost-user protocol for both ends: messages, a connection without its socket, and transports around it."""
