"""What numba imports at its first compilation: a server that forks has it ready for every child."""
import numba

numba.njit(lambda x: x + 1)(1)
