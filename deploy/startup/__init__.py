"""How the loop on one machine comes up, stays up and goes down."""
