"""How the choice is learned. Pure: numpy and numbers; no torch, no grpc, imports no other room."""
