"""An HTTP server that holds one generator and a queue."""
