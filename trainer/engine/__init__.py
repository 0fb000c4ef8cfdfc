"""How a step is computed: scores, gradients, the guard, and the optimizers that apply them."""
