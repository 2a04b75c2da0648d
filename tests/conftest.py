"""What every test shares: MKL adds up as recon.py lets it, here and in every process that a test starts.

MKL reads the setting once. Without this, whether a process has it would depend on which test came first, and processes
that are compared to the bit would differ.
"""

import utils

utils.reproducible_products()
