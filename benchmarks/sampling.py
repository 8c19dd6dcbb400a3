"""Sampling speed: each prior's fast sampler against the slow form of the same model, in one run.

    python benchmarks/sampling.py [--only lvt,rvd]

A slow side that is extrapolated from a measured slice of it is labelled so.
"""

from common import run_parts  # isort: skip  (sets the thread policy before torch loads)

from sampling_compiled import compiled
from sampling_dtypes import dtypes
from sampling_flow import flow
from sampling_lvt import attention, lvt
from sampling_masked import masked
from sampling_recurrent_vae import recurrent_vae
from sampling_rvd import rvd
from sampling_st_pixelcnn import st_pixelcnn
from sampling_stdiff import stdiff

PARTS = {
    "lvt": lvt,
    "attention": attention,
    "st_pixelcnn": st_pixelcnn,
    "recurrent_vae": recurrent_vae,
    "stdiff": stdiff,
    "rvd": rvd,
    "masked": masked,
    "flow": flow,
    "dtypes": dtypes,
    "compiled": compiled,
}

if __name__ == "__main__":
    run_parts(__doc__.splitlines()[0], PARTS)
