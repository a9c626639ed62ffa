"""What the server can do, once, for HTTP and gRPC alike: plain values in, plain values or errors out."""
