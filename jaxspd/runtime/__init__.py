"""What runs programs, whatever they compute: compiling, streaming, memory. It knows no model."""
