"""The worker plane: trains on every rank. Imports torch and Accelerate; knows the control plane's leaves only."""
