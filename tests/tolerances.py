"""Every tolerance the tests use, with its reason."""

# The same float32 mathematics in another order of operations: a few ulp per layer, summed.
FLOAT32_PARITY = 1e-5
# Sigma tables are quoted to seven digits in the documentation they come from.
SIGMA_TABLE = 1e-7
# One float32 addition in another order (leftover noise divided and multiplied back).
FLOAT32_REORDERED = 1e-6
# LightX2V's code and ours over four whole steps; rounding differs in each layer. Seen: 1.9e-6.
LIGHTX2V_LATENTS = 1e-5
