"""How a run gets to the machine: command lines for Slurm, torchrun and this machine."""
