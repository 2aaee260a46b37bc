//! The Python binding: validates, finds dtypes, makes results, and turns errors of the core into exceptions.
//!
//! Every function takes all its arguments by position; names, defaults and docstrings are those of the facade (`python/crossent`), which
//! forwards them. Arguments are views of NumPy's memory: nothing is copied, and nothing is written but results.

use pyo3::prelude::*;

mod arrays;
mod by_products;
mod config;
mod dlpack;
mod errors;
mod losses;
mod options;
mod results;
mod targets;
mod transforms;

#[pymodule(gil_used = false)]
#[pyo3(name = "_core")]
mod core_module {
    use pyo3::prelude::*;

    #[pymodule_export]
    use super::by_products::{kl_divergence, kl_divergence_with_grad, score_tokens, topk_logprobs};
    #[pymodule_export]
    use super::config::{
        bandwidth, check_num_threads, clear_cache, config, get_num_threads, set_cache_limit, set_num_threads, set_simd_level, simd_level,
        simd_levels,
    };
    #[pymodule_export]
    use super::losses::{cross_entropy, cross_entropy_with_grad, nll_loss, nll_loss_with_grad};
    #[pymodule_export]
    use super::transforms::{log_softmax, log_softmax_vjp, logsumexp, softmax, softmax_vjp};

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))?;
        module.add("threads_var", super::config::start(module.py())?)
    }
}
