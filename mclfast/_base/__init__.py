"""What every package needs and none owns: checks, files, tensors, modules, the machine."""
