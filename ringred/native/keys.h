/* Keys: what a call is found by, made of its arguments. For recall.c. */
#ifndef RINGRED_KEYS_H
#define RINGRED_KEYS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "dlpack.h"

enum { KEY_WORDS = 256, DTYPES = 16 };

/* All that a call depends on: of a tensor its address, length and dtype, of an int its value, of a list or tuple its length
 * and items, of anything else (a float, too) which object it is. */
typedef struct {
    int64_t length, words[KEY_WORDS];
} Key;

/* What is known of torch: the class of plain tensors; the function by which it says without Python what one is (0 if it has
 * none); and which dtype each of DLPack's numbers means, learned from `examples`, pairs of an empty tensor and its dtype. */
typedef struct {
    PyObject *plain, *examples;
    ViewOf view;
    struct {
        uint64_t number;
        PyObject *dtype;
    } dtypes[DTYPES];
} Keys;

static PyObject *is_cpu, *is_contiguous, *is_conj, *is_neg, *data_ptr, *numel, *dtype; /* names */

static int add_word(Key *key, int64_t word) {
    if (key->length == KEY_WORDS) return 0;
    key->words[key->length++] = word;
    return 1;
}

static int method_says(PyObject *tensor, PyObject *name, PyObject *expected) {
    PyObject *got = PyObject_CallMethodObjArgs(tensor, name, NULL);
    Py_XDECREF(got);
    return got == expected;
}

static int add_attribute(Key *key, PyObject *tensor, PyObject *name, PyObject *expected) {
    PyObject *got = PyObject_GetAttr(tensor, name);
    Py_XDECREF(got);
    return expected ? got == expected : got && add_word(key, (int64_t)got);
}

static int add_value(Key *key, PyObject *number) {
    long long value = PyLong_AsLongLong(number);
    return !(value == -1 && PyErr_Occurred()) && add_word(key, value);
}

static int add_number(Key *key, PyObject *tensor, PyObject *name) {
    PyObject *got = PyObject_CallMethodObjArgs(tensor, name, NULL);
    int added = got && add_value(key, got);
    Py_XDECREF(got);
    return added;
}

static uint64_t number_of(const View *view) {
    return UINT64_C(1) << 32 | (uint64_t)view->dtype.lanes << 16 | (uint64_t)view->dtype.code << 8 | view->dtype.bits;
}

/* Adds the dtype, as an object, if it is one of the examples'. */
static int add_dtype(const Keys *keys, Key *key, const View *view) {
    uint64_t number = number_of(view);
    for (int at = 0; at < DTYPES && keys->dtypes[at].number; at++)
        if (keys->dtypes[at].number == number) return add_word(key, (int64_t)keys->dtypes[at].dtype);
    return 0;
}

static int is_in_a_row(const View *view, int64_t *elements) {
    int64_t count = 1, gaps = 0;
    for (int32_t at = view->dimensions - 1; at >= 0; at--) {
        gaps |= view->shape[at] != 1 && view->strides[at] != count;
        count *= view->shape[at];
    }
    *elements = count;
    return !gaps || !count;
}

/* Where it is plain memory, which these words describe fully. Memory that has no address, of a sparse tensor, raises. */
static int add_tensor(const Keys *keys, Key *key, PyObject *tensor) {
    View view;
    int64_t elements;
    if (!keys->view)
        return add_number(key, tensor, data_ptr) && add_number(key, tensor, numel) && add_attribute(key, tensor, dtype, NULL)
               && add_attribute(key, tensor, is_cpu, Py_True) && method_says(tensor, is_contiguous, Py_True)
               && method_says(tensor, is_conj, Py_False) && method_says(tensor, is_neg, Py_False);
    return !keys->view(tensor, &view) && view.device == DLPACK_CPU && is_in_a_row(&view, &elements)
           && add_word(key, (int64_t)(view.data + view.byte_offset)) && add_word(key, elements)
           && add_dtype(keys, key, &view) && method_says(tensor, is_neg, Py_False)
           && (view.dtype.code != DLPACK_COMPLEX || method_says(tensor, is_conj, Py_False));
}

static int add(const Keys *keys, Key *key, PyObject *one) {
    if ((PyObject *)Py_TYPE(one) == keys->plain) return add_tensor(keys, key, one);
    if (PyLong_CheckExact(one)) return add_value(key, one);
    if (!PyList_Check(one) && !PyTuple_Check(one)) return add_word(key, (int64_t)one);
    if (!PyList_CheckExact(one) && !PyTuple_CheckExact(one)) return 0;
    Py_ssize_t length = PySequence_Size(one);
    if (!add_word(key, length)) return 0;
    for (Py_ssize_t at = 0; at < length; at++) {
        PyObject *item = PySequence_GetItem(one, at);
        int added = item && add(keys, key, item);
        Py_XDECREF(item);
        if (!added) return 0;
    }
    return 1;
}

/* The key of a call, as tensors.identity makes it. 0 if it has none, -1 if what torch was asked raised what nobody may
 * catch, as Ctrl-C does. */
static int key_of(const Keys *keys, Key *key, PyObject *const *args, Py_ssize_t given) {
    key->length = 0;
    for (Py_ssize_t at = 0; at < given; at++)
        if (!add(keys, key, args[at])) {
            if (!PyErr_Occurred()) return 0;
            if (!PyErr_ExceptionMatches(PyExc_Exception)) return -1;
            PyErr_Clear();
            return 0;
        }
    return 1;
}

/* The same of what tensors.identity made. */
static int key_from(Key *key, PyObject *identity) {
    key->length = 0;
    for (Py_ssize_t at = 0; at < PyTuple_Size(identity); at++) {
        PyObject *one = PyTuple_GetItem(identity, at);
        if (!(PyLong_CheckExact(one) ? add_value(key, one) : add_word(key, (int64_t)one))) {
            PyErr_Clear();
            return 0;
        }
    }
    return 1;
}

static int intern_names(void) {
    struct {
        PyObject **name;
        const char *text;
    } names[] = {{&is_cpu, "is_cpu"}, {&is_contiguous, "is_contiguous"}, {&is_conj, "is_conj"}, {&is_neg, "is_neg"},
                 {&data_ptr, "data_ptr"}, {&numel, "numel"}, {&dtype, "dtype"}};
    for (size_t at = 0; at < sizeof names / sizeof *names; at++)
        if (!(*names[at].name = PyUnicode_InternFromString(names[at].text))) return 0;
    return 1;
}

static ViewOf view_of(PyObject *plain) {
    PyObject *capsule = PyObject_GetAttrString(plain, "__dlpack_c_exchange_api__");
    const Exchange *exchange = capsule ? PyCapsule_GetPointer(capsule, "dlpack_exchange_api") : NULL;
    Py_XDECREF(capsule); /* the table stays as long as its library */
    PyErr_Clear();
    while (exchange && exchange->major != DLPACK_MAJOR) exchange = exchange->older;
    return exchange ? exchange->view : 0;
}

/* False, with an exception, if `examples` is not as it should be. */
static int know(Keys *keys, PyObject *plain, PyObject *examples) {
    Py_INCREF(plain), Py_INCREF(examples);
    keys->plain = plain, keys->examples = examples;
    keys->view = view_of(plain);
    for (Py_ssize_t at = 0; keys->view && at < PyTuple_Size(examples) && at < DTYPES; at++) {
        PyObject *pair = PyTuple_GetItem(examples, at), *example, *dtype;
        View view;
        if (!PyArg_ParseTuple(pair, "OO", &example, &dtype) || keys->view(example, &view)) return 0;
        keys->dtypes[at].number = number_of(&view), keys->dtypes[at].dtype = dtype;
    }
    return 1;
}

#endif
