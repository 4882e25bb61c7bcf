"""The losses: functions, modules, and the plain PyTorch that defines them."""
