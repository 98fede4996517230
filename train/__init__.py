"""A minimal trainer for ε-DPO on transformers.Trainer. Run it as ``python -m train``."""
