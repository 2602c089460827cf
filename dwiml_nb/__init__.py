__version__ = "0.1.0"

import os
import sys

# Between two small operations the threads of OpenMP spin for long, which takes the cores from everybody else on the machine and
# makes a step several times slower as soon as somebody else is there. Here they spin for some microseconds, as long as it takes
# until the next operation, and then sleep. OpenMP reads this when torch is loaded.
idle_threads = 'spin' if 'torch' in sys.modules else 'soon sleep'
if os.environ.keys() & {'OMP_WAIT_POLICY', 'GOMP_SPINCOUNT', 'KMP_BLOCKTIME'}: idle_threads = 'do what the environment says'
else: os.environ['GOMP_SPINCOUNT'] = '1000'
del os, sys
