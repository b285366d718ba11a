"""gRPC and HTTP: parse and format only, both over the one scoring core."""
