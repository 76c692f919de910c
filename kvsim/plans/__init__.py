"""What a step amounts to: a policy's plans as polynomials, evaluated for any number of tokens."""
