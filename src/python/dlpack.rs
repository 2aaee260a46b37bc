//! Arrays of other libraries, read where they lie through the DLPack protocol, legacy and versioned.

use core::ffi::{CStr, c_void};
use core::ptr::NonNull;

use pyo3::exceptions::{PyAttributeError, PyException, PyTypeError};
use pyo3::ffi;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyDict};

use super::arrays::View;
use super::errors::{type_error, type_name, value_error};
use crate::array::{Array, DType, Dims, c_strides};

const LEGACY: &CStr = c"dltensor";
const LEGACY_USED: &CStr = c"used_dltensor";
const VERSIONED: &CStr = c"dltensor_versioned";
const VERSIONED_USED: &CStr = c"used_dltensor_versioned";

/// Device types whose memory the CPU reads: plain, and pinned by CUDA or `ROCm`.
const HOST: [i32; 3] = [1, 3, 11];

#[repr(C)]
struct Tensor {
    data: *mut u8,
    device_type: i32,
    device_id: i32,
    ndim: i32,
    code: u8,
    bits: u8,
    lanes: u16,
    shape: *const i64,
    /// In elements; null means C order.
    strides: *const i64,
    byte_offset: u64,
}

#[repr(C)]
pub(super) struct Legacy {
    tensor: Tensor,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Self)>,
}

#[repr(C)]
pub(super) struct Versioned {
    major: u32,
    minor: u32,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Self)>,
    flags: u64,
    tensor: Tensor,
}

/// What a producer has lent; given back on drop.
#[derive(Debug)]
pub(super) enum Lent {
    Legacy(NonNull<Legacy>),
    Versioned(NonNull<Versioned>),
}

impl Drop for Lent {
    fn drop(&mut self) {
        // SAFETY: taken from a capsule that was renamed to "used", so that the deleter is ours to call, once, while attached.
        unsafe {
            match *self {
                Self::Legacy(managed) => {
                    if let Some(deleter) = (*managed.as_ptr()).deleter {
                        deleter(managed.as_ptr());
                    }
                }
                Self::Versioned(managed) => {
                    if let Some(deleter) = (*managed.as_ptr()).deleter {
                        deleter(managed.as_ptr());
                    }
                }
            }
        }
    }
}

/// A view of an object with `__dlpack__` and `__dlpack_device__`.
pub(super) fn view<'py>(object: &Bound<'py, PyAny>, argument: &'static str) -> PyResult<View<'py>> {
    let py = object.py();
    let device = object.call_method0(intern!(py, "__dlpack_device__")).map_err(|error| refused(object, argument, error))?;
    let (kind, number) = device
        .extract::<(i32, i32)>()
        .map_err(|_| type_error(format!("{argument}: {}.__dlpack_device__() did not return two integers", type_name(object))))?;
    if !HOST.contains(&kind) {
        let device = device_name(kind, number);
        return Err(value_error(format!(
            "{argument} is on the device {device}; crossent computes on the CPU: copy it there first ({argument}.cpu() for a torch tensor)"
        )));
    }
    if let Some(negated) = object.getattr_opt(intern!(py, "is_neg"))?
        && negated.is_callable()
        && negated.call0()?.is_truthy()?
    {
        // PyTorch lends such a view as if it were not negated.
        return Err(value_error(format!("{argument} is a negated view whose memory has the other sign; pass {argument}.resolve_neg()")));
    }
    let capsule = export(object, argument)?;
    let lent = take(&capsule, argument)?;
    let tensor = match &lent {
        // SAFETY: valid until the deleter runs, which is when `lent` dies.
        Lent::Legacy(managed) => unsafe { &managed.as_ref().tensor },
        // SAFETY: as above.
        Lent::Versioned(managed) => unsafe { &managed.as_ref().tensor },
    };
    let array = array(tensor, argument)?;
    Ok(View::from_dlpack(object, array, lent))
}

fn export<'py>(object: &Bound<'py, PyAny>, argument: &str) -> PyResult<Bound<'py, PyCapsule>> {
    let py = object.py();
    let options = PyDict::new(py);
    options.set_item(intern!(py, "max_version"), (1, 0))?;
    let export = object.getattr(intern!(py, "__dlpack__"))?;
    let capsule = match export.call((), Some(&options)) {
        // Producers older than version 1 do not know the keyword.
        Err(error) if error.is_instance_of::<PyTypeError>(py) => export.call0(),
        result => result,
    };
    let capsule = capsule.map_err(|error| refused(object, argument, error))?;
    capsule
        .cast_into::<PyCapsule>()
        .map_err(|_| type_error(format!("{argument}: {}.__dlpack__() did not return a capsule", type_name(object))))
}

/// What the producer said when it would not lend, with the remedy where the reason is known.
fn refused(object: &Bound<'_, PyAny>, argument: &str, error: PyErr) -> PyErr {
    let py = object.py();
    // What is no `Exception` means to end more than this call.
    if error.is_instance_of::<PyAttributeError>(py) || !error.is_instance_of::<PyException>(py) {
        return error;
    }
    let learns = object.getattr("requires_grad").and_then(|flag| flag.is_truthy()).unwrap_or(false);
    let message = if learns {
        format!("{argument} requires grad, and crossent would not record what it does with it; pass {argument}.detach()")
    } else {
        format!("{argument}: {} cannot be read through DLPack: {}", type_name(object), error.value(py))
    };
    let named = value_error(message);
    named.set_cause(py, Some(error));
    named
}

/// Takes over what the capsule holds.
fn take(capsule: &Bound<'_, PyCapsule>, argument: &str) -> PyResult<Lent> {
    let raw = capsule.as_ptr();
    // SAFETY: `raw` is a live capsule. A capsule of these names holds a pointer to the struct of that name (the protocol); renaming it tells
    // its destructor that the deleter is now ours.
    unsafe {
        if ffi::PyCapsule_IsValid(raw, VERSIONED.as_ptr()) != 0 {
            let managed = ffi::PyCapsule_GetPointer(raw, VERSIONED.as_ptr()).cast::<Versioned>();
            if (*managed).major != 1 {
                return Err(type_error(format!(
                    "{argument} comes by DLPack version {}; versions 0 and 1 are understood",
                    (*managed).major
                )));
            }
            if ffi::PyCapsule_SetName(raw, VERSIONED_USED.as_ptr()) == 0
                && let Some(managed) = NonNull::new(managed)
            {
                return Ok(Lent::Versioned(managed));
            }
        } else if ffi::PyCapsule_IsValid(raw, LEGACY.as_ptr()) != 0 {
            let managed = ffi::PyCapsule_GetPointer(raw, LEGACY.as_ptr()).cast::<Legacy>();
            if ffi::PyCapsule_SetName(raw, LEGACY_USED.as_ptr()) == 0
                && let Some(managed) = NonNull::new(managed)
            {
                return Ok(Lent::Legacy(managed));
            }
        }
    }
    Err(type_error(format!("{argument}: its DLPack capsule is not valid or was used before")))
}

fn array<'py>(tensor: &Tensor, argument: &str) -> PyResult<Array<'py>> {
    let dtype = match (tensor.code, tensor.bits, tensor.lanes) {
        (0, 8, 1) => DType::I8,
        (0, 16, 1) => DType::I16,
        (0, 32, 1) => DType::I32,
        (0, 64, 1) => DType::I64,
        (1, 8, 1) => DType::U8,
        (1, 16, 1) => DType::U16,
        (1, 32, 1) => DType::U32,
        (1, 64, 1) => DType::U64,
        (2, 16, 1) => DType::F16,
        (2, 32, 1) => DType::F32,
        (2, 64, 1) => DType::F64,
        (4, 16, 1) => DType::Bf16,
        (6, 8, 1) => DType::Bool,
        (code, bits, lanes) => {
            let kind = match code {
                0 => "int",
                1 => "uint",
                2 => "float",
                4 => "bfloat",
                5 => "complex",
                6 => "bool",
                _ => "unknown type code ",
            };
            let kind = if kind.ends_with(' ') { format!("{kind}{code} of ") } else { kind.to_owned() };
            let lanes = if lanes == 1 { String::new() } else { format!(" × {lanes} lanes") };
            return Err(type_error(format!("{argument} has dtype {kind}{bits}{lanes}, which crossent does not read")));
        }
    };
    let broken = || value_error(format!("{argument}: its DLPack description is not that of an array"));
    let ndim = usize::try_from(tensor.ndim).map_err(|_| broken())?;
    let mut shape = Dims::<usize>::new();
    let mut strides = Dims::<isize>::new();
    if ndim > 0 {
        if tensor.shape.is_null() {
            return Err(broken());
        }
        // SAFETY: the protocol promises `ndim` lengths.
        for &len in unsafe { core::slice::from_raw_parts(tensor.shape, ndim) } {
            shape.push(usize::try_from(len).map_err(|_| broken())?);
        }
        if tensor.strides.is_null() {
            strides = c_strides(&shape, dtype.size());
        } else {
            // SAFETY: and `ndim` strides, where there are any.
            for &stride in unsafe { core::slice::from_raw_parts(tensor.strides, ndim) } {
                strides.push(isize::try_from(stride).ok().and_then(|s| s.checked_mul(dtype.size() as isize)).ok_or_else(broken)?);
            }
        }
    }
    let offset = usize::try_from(tensor.byte_offset).map_err(|_| broken())?;
    let data = if shape.contains(&0) {
        NonNull::<u64>::dangling().as_ptr().cast()
    } else if tensor.data.is_null() {
        return Err(broken());
    } else {
        tensor.data.wrapping_add(offset)
    };
    // SAFETY: the producer promises that this memory is readable until its deleter runs, and the view holds what keeps it from running.
    Ok(unsafe { Array::new(data, dtype, false, &shape, &strides) })
}

fn device_name(kind: i32, number: i32) -> String {
    let name = match kind {
        2 => "cuda",
        4 => "opencl",
        7 => "vulkan",
        8 => "metal",
        10 => "rocm",
        13 => "cuda (managed)",
        14 => "oneapi",
        15 => "webgpu",
        16 => "hexagon",
        other => return format!("of DLPack type {other}, number {number}"),
    };
    format!("{name}:{number}")
}
