"""An HTTP server with one generator and a queue."""
