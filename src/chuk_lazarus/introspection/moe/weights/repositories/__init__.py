"""The places that models are read from: folders on this machine, and the Hub."""
