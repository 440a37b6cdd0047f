"""The HTTP API of a running process: routes, their description as OpenAPI, and a server with limits for its clients.

Imported only where an API is served.
"""
