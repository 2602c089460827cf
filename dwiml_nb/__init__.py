__version__ = "0.1.0"

import os
import sys

# Between two small operations the threads of OpenMP spin, which takes the cores from everybody else on the machine and
# makes a step several times slower as soon as somebody else is there. Here they sleep. OpenMP reads this when torch is loaded.
idle_threads = 'spin' if 'torch' in sys.modules else 'sleep'
if os.environ.keys() & {'OMP_WAIT_POLICY', 'GOMP_SPINCOUNT', 'KMP_BLOCKTIME'}: idle_threads = 'do what the environment says'
else: os.environ['OMP_WAIT_POLICY'] = 'passive'
del os, sys
