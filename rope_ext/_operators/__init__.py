"""The operators, one record each; a family has the file of its name in csrc.

rotation.py            by rows of cos and sin, and the gradient to them
qkv.py                 the same out of a packed tensor, and the gradient to that
angles.py              cos and sin of positions, and the gradient to frequencies
rotation_by_angles.py  without a table
kv_cache.py            with an append to a paged cache
quantize.py            to float8, with a scale of each group of channels
rms_norm.py            after RMSNorm
token_order.py         the tokens of each row of a table
"""

from rope_ext._operators.angles import ANGLES
from rope_ext._operators.kv_cache import KV_CACHE
from rope_ext._operators.qkv import QKV
from rope_ext._operators.quantize import QUANTIZE
from rope_ext._operators.rms_norm import RMS_NORM
from rope_ext._operators.rotation import ROTATION
from rope_ext._operators.rotation_by_angles import ROTATION_BY_ANGLES

OPERATORS = (*ROTATION, *QKV, *ANGLES, *ROTATION_BY_ANGLES, *KV_CACHE, *QUANTIZE, *RMS_NORM)
