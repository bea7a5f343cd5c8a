"""A traced forward function as data: its equations, the norms in it, and its evaluator."""
