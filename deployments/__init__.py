"""How the flows are put to work: their deployments, what a server needs for them, and a service on this machine."""
