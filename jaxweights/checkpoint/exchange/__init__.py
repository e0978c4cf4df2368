"""Quantized checkpoints of other programs: their tensors to represented weights, and back."""

from jaxweights.checkpoint.exchange._awq import pack_awq as pack_awq
from jaxweights.checkpoint.exchange._awq import unpack_awq as unpack_awq
from jaxweights.checkpoint.exchange._bitsandbytes import pack_bitsandbytes as pack_bitsandbytes
from jaxweights.checkpoint.exchange._bitsandbytes import unpack_bitsandbytes as unpack_bitsandbytes
from jaxweights.checkpoint.exchange._compressed_tensors import (
    pack_int_quantized as pack_int_quantized,
)
from jaxweights.checkpoint.exchange._compressed_tensors import (
    pack_pack_quantized as pack_pack_quantized,
)
from jaxweights.checkpoint.exchange._compressed_tensors import (
    unpack_int_quantized as unpack_int_quantized,
)
from jaxweights.checkpoint.exchange._compressed_tensors import (
    unpack_pack_quantized as unpack_pack_quantized,
)
from jaxweights.checkpoint.exchange._gptq import pack_gptq as pack_gptq
from jaxweights.checkpoint.exchange._gptq import unpack_gptq as unpack_gptq
from jaxweights.checkpoint.exchange._module import LazyWeight as LazyWeight
from jaxweights.checkpoint.exchange._module import Part as Part
from jaxweights.checkpoint.exchange._narrow_floats import (
    pack_float_quantized as pack_float_quantized,
)
from jaxweights.checkpoint.exchange._narrow_floats import pack_mxfp4 as pack_mxfp4
from jaxweights.checkpoint.exchange._narrow_floats import pack_nvfp4 as pack_nvfp4
from jaxweights.checkpoint.exchange._narrow_floats import (
    unpack_float_quantized as unpack_float_quantized,
)
from jaxweights.checkpoint.exchange._narrow_floats import unpack_mxfp4 as unpack_mxfp4
from jaxweights.checkpoint.exchange._narrow_floats import unpack_nvfp4 as unpack_nvfp4
from jaxweights.checkpoint.exchange._settings import quantized_modules as quantized_modules
from jaxweights.checkpoint.exchange._words import pack_words as pack_words
from jaxweights.checkpoint.exchange._words import unpack_words as unpack_words
from jaxweights.checkpoint.exchange._write import write_quantized as write_quantized
