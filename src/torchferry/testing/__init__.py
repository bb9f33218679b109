"""For those who write or test a backend: real servers, a fault-injecting proxy, and the conformance suite."""
