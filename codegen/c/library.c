/* Ops of torch's on few elements, and calls of torch's matrix products, as bodies of launches: without Python and the
 * dispatcher in between. An op is one whose float32 result IEEE 754 defines, so that it has the bits of torch's own.
 */

enum { COPY, NEGATE, MAGNITUDE, ROOT, RECIPROCAL, RECIPROCAL_ROOT, ADD, SUBTRACT, MULTIPLY, DIVIDE };
enum { FLOAT32, BFLOAT16, FLOAT16, BITS16, NUMBER }; /* BITS16 of whatever, which only move */

#define CHUNK 128 /* elements on their way through float32 */

/* What follows `header` in a geometry: sizes, the last dimension last, and the strides of left, right and output. */
struct header {
    int64_t op, left, right, output; /* and the kinds of its operands */
    double number;                   /* that stands for the right operand */
    int64_t dimensions;
};

/* `count` elements, from `apart` to `to_apart` between them; one by one, for vectors would be code for a few. */
static void move(void *to, int64_t to_apart, const void *from, int64_t apart, int64_t wide, int64_t count) {
    if (to_apart == 1 && apart == 1) {
        memcpy(to, from, (size_t)(count * (wide ? 4 : 2)));
        return;
    }
    for (int64_t i = 0; i < count; i++) {
        if (wide)
            ((uint32_t *)to)[i * to_apart] = ((const uint32_t *)from)[i * apart];
        else
            ((uint16_t *)to)[i * to_apart] = ((const uint16_t *)from)[i * apart];
        __asm__ volatile("" ::: "memory");
    }
}

/* A whole chunk of float32, whatever lies beyond its elements. */
#define EACH(value)                                                                                                    \
    for (int64_t i = 0; i < CHUNK; i++) to[i] = value;                                                                 \
    break;

static void widen(float *restrict to, const void *from, int64_t kind) {
    const float *floats = from;
    const uint16_t *halves = from;
    switch (kind) {
    case FLOAT32: EACH(floats[i])
    case FLOAT16: EACH(from_float16(halves[i]))
    default: EACH(from_bfloat16(halves[i]))
    }
}

static void narrow(uint16_t *restrict to, const float *restrict from, int64_t kind) {
    switch (kind) {
    case BFLOAT16: EACH(to_bfloat16(from[i]))
    case FLOAT16: EACH(to_float16(from[i]))
    default: EACH((uint16_t)(as_bits(from[i]) >> 16))
    }
}

static void compute(float *restrict to, const float *restrict x, const float *restrict y, int64_t op) {
    switch (op) {
    case NEGATE: EACH(-x[i])
    case MAGNITUDE: EACH(fabsf(x[i]))
    case ROOT: EACH(sqrtf(x[i]))
    case RECIPROCAL: EACH(1.0f / x[i])
    case RECIPROCAL_ROOT: EACH(1.0f / sqrtf(x[i]))
    case ADD: EACH(x[i] + y[i])
    case SUBTRACT: EACH(x[i] - y[i])
    case MULTIPLY: EACH(x[i] * y[i])
    case DIVIDE: EACH(x[i] / y[i])
    default: EACH(x[i])
    }
}

static char *at(void *memory, int64_t kind, int64_t offset) {
    return (char *)memory + offset * (kind == FLOAT32 ? 4 : 2);
}

/* Operands: left, right (whatever, for ops that have none), output. */
void small_op(void *const *operands, const int64_t *geometry, int64_t begin, int64_t end) {
    struct header head;
    memcpy(&head, geometry, sizeof head);
    int64_t last = head.dimensions - 1;
    const int64_t *sizes = geometry + sizeof head / sizeof *geometry;
    const int64_t *left = sizes + head.dimensions, *right = left + head.dimensions, *output = right + head.dimensions;
    float x[CHUNK] = {0}, y[CHUNK], result[CHUNK];
    uint32_t raw[CHUNK] = {0};
    for (int64_t i = 0; i < CHUNK; i++) y[i] = (float)head.number;
    for (int64_t row = begin; row < end; row++) {
        int64_t from_left = 0, from_right = 0, to = 0;
        for (int64_t dimension = last - 1, rest = row; dimension >= 0; dimension--) {
            int64_t index = rest % sizes[dimension];
            rest /= sizes[dimension];
            from_left += index * left[dimension];
            from_right += index * right[dimension];
            to += index * output[dimension];
        }
        for (int64_t first = 0; first < sizes[last]; first += CHUNK) {
            int64_t count = sizes[last] - first < CHUNK ? sizes[last] - first : CHUNK;
            move(raw, 1, at(operands[0], head.left, from_left + first * left[last]), left[last], head.left == FLOAT32,
                 count);
            widen(x, raw, head.left);
            if (head.op >= ADD && head.right != NUMBER) {
                move(raw, 1, at(operands[1], head.right, from_right + first * right[last]), right[last],
                     head.right == FLOAT32, count);
                widen(y, raw, head.right);
            }
            compute(result, x, y, head.op);
            if (head.output != FLOAT32) narrow((uint16_t *)raw, result, head.output);
            move(at(operands[2], head.output, to + first * output[last]), output[last],
                 head.output == FLOAT32 ? (void *)result : raw, 1, head.output == FLOAT32, count);
        }
    }
}

typedef int32_t product(void *out, void *left, void *right); /* AOTInductor's shim of mm */

/* Operands: handles of output, left and right for each unit. */
void products(void *const *operands, const int64_t *geometry, int64_t begin, int64_t end) {
    product *function = (product *)geometry[0];
    for (void *const *handles = operands + 3 * begin; handles < operands + 3 * end; handles += 3)
        if (function(handles[0], handles[1], handles[2])) __atomic_fetch_add(&failures, 1, __ATOMIC_RELAXED);
}
