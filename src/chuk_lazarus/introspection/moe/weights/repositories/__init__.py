"""Where bytes come from: folders on this machine and models on the Hub."""
