/* test_layers once more with the built-in matrix products, where the other one runs oneDNN's. */
#ifdef USE_DNNL
#undef USE_DNNL
#include "test_layers.c"
#else
#include "test.h"

int main(void) {
    skip("built-in matrix products", "without oneDNN test_layers has run them already");
    return test_summary(__BASE_FILE__);
}
#endif
