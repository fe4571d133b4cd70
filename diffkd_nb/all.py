"Everything a notebook user needs: `from diffkd_nb.all import *`"
from .taps import *
from .noise_adapter import *
from .autoencoder import *
from .diffusion import *
from .losses import *
from .diffkd import *
from .callback import *
from .methods import *
from .data import *
from .models import *
from .recipes import *
from .teacher_cache import *
from .fast import *
from .experiment import *
from .plots import *
