"""Other people's MoE layers on the same weights and inputs: which there are, and what each cannot do."""
