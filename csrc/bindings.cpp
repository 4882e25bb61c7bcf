// The Python module mclfast._C. It links to the libraries of torch by name only, so Python has to
// `import torch` before it can load this.

// pybind11 alone: torch/extension.h would add half a minute to every build of this file.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "build_info.h"

namespace py = pybind11;

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "C++ part of mclfast.";
  m.def(
      "build_info",
      [] {
        const mclfast::BuildInfo info = mclfast::build_info();
        py::dict out;
        out["compiler"] = info.compiler;
        out["cxx_standard"] = info.cxx_standard;
        out["torch"] = info.torch;
        out["parallel"] = info.parallel;
        out["threads"] = info.threads;
        out["cpu_capability"] = info.cpu_capability;
        out["simd"] = info.simd;
        out["build_type"] = info.build_type;
        out["with_cuda"] = info.with_cuda;
        return out;
      },
      "What the extension was compiled with.");
}
