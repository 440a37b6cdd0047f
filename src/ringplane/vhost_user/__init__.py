"""The vhost-user protocol: messages, a connection without its socket, and transports around it."""
