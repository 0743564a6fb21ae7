"""How a job is cut, what that costs (plain python), and how a piece runs (torch, only in *_torch.py)."""
