/* A back end that defers (Backend.defer), made of one that computes at once: what a step gives out is kept until it is
   asked for. Dies where the loop leaves a step's result behind and goes on as if it had looked at it. */
#ifndef GSA_TEST_LATE_H
#define GSA_TEST_LATE_H

#include "../gsa/run/train.h"

static Backend at_once;
static bool within; /* a step is under way */
static double clip;
static StepResult given, queue[2]; /* what the step has given out so far; results that were not asked for */
static int waiting;

static double late_forward(void *model, const int *x, const int *y, int B, int T) {
    double loss = at_once.forward(model, x, y, B, T);
    if (!within) {
        if (waiting) die("the loop evaluates before it has looked at a step");
        return loss;
    }
    given.loss += loss;
    return 0;
}
static void late_norms(void *model, double norms[NUM_CLIPS]) {
    at_once.gradient_norms(model, given.norms);
    for (int c = 0; c < NUM_CLIPS; c++) norms[c] = within ? 0 : given.norms[c];
}
static void late_update(void *model, const Update *u, int64_t clamped[NUM_BOUNDS]) {
    Update own = *u;
    for (int c = 0; c < NUM_CLIPS && within; c++)
        own.scale[c] = clip > 0 && given.norms[c] > clip ? clip / given.norms[c] : 1;
    at_once.update(model, &own, given.clamped);
    for (int i = 0; i < NUM_BOUNDS; i++) clamped[i] = within ? 0 : given.clamped[i];
}
static const float *late_read(void *model, int buffer) {
    if (waiting) die("the loop reads the model before it has looked at a step");
    return at_once.read(model, buffer);
}
static void late_defer(void *model, bool on, double largest) {
    (void)model;
    within = on;
    clip = largest;
    if (on) memset(&given, 0, sizeof given);
    else if (waiting == 2) die("the loop leaves three results behind");
    else queue[waiting++] = given;
}
static void late_result(void *model, StepResult *out) {
    (void)model;
    if (!waiting) die("the loop asks for a result that is not there");
    *out = queue[0];
    queue[0] = queue[1];
    waiting--;
}

static Backend late_backend(Backend b) {
    at_once = b;
    b.read = late_read;
    b.forward = late_forward;
    b.gradient_norms = late_norms;
    b.update = late_update;
    b.defer = late_defer;
    b.result = late_result;
    return b;
}

#endif
