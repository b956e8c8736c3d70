"""Console commands: parse the arguments, call the library, print."""
