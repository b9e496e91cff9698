/* What is used of DLPack's table of functions, by which a library of tensors says what lies where without Python
 * (`__dlpack_c_exchange_api__` of the class; version 1.3 of github.com/dmlc/dlpack, include/dlpack/dlpack.h). */
#ifndef RINGRED_DLPACK_H
#define RINGRED_DLPACK_H

#include <stdint.h>

enum { DLPACK_MAJOR = 1, DLPACK_CPU = 1, DLPACK_COMPLEX = 5 };

/* A tensor as it lies in memory, which stays its library's. */
typedef struct {
    char *data;
    int32_t device, device_number, dimensions;
    struct {
        uint8_t code, bits;
        uint16_t lanes;
    } dtype;
    const int64_t *shape, *strides; /* in elements */
    uint64_t byte_offset;
} View;

/* Whether it could: 0, or -1 with an exception of Python. */
typedef int (*ViewOf)(void *tensor, View *view);

typedef struct Exchange {
    uint32_t major, minor;
    const struct Exchange *older;
    void (*unused[3])(void);
    ViewOf view; /* or 0 */
} Exchange;

#endif
