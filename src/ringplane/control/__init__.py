"""The control plane: settings, servers, sockets, exports, takeover by another process, confinement."""
