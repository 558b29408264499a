/* test_layers once more with the built-in matrix products, where the other one runs oneDNN's. */
#undef USE_DNNL
#include "test_layers.c"
