// Runs a package of a cached model step by step, and prints what each step made and how many were reused so far.
//
//     denoise model.pt2 steps.pt
//
// steps.pt is what `torch.save` wrote of (state, steps, hits): the tensors of an empty state in order, for each step the
// model's inputs in order, and the place of the number of hits in the state. docs/export.md builds and runs it.

#include <fstream>
#include <iostream>
#include <iterator>
#include <vector>

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

std::vector<at::Tensor> tensors(const c10::IValue& list) {
  std::vector<at::Tensor> found;
  for (const c10::IValue& tensor : list.toListRef()) found.push_back(tensor.toTensor());
  return found;
}

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: denoise model.pt2 steps.pt\n";
    return 2;
  }
  c10::InferenceMode inference;
  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  std::ifstream file(argv[2], std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const auto given = torch::jit::pickle_load(bytes).toTupleRef().elements().vec();
  auto state = tensors(given[0]);
  const auto hits = given[2].toInt();

  std::cout.precision(9);
  for (const c10::IValue& step : given[1].toListRef()) {
    auto inputs = state;
    for (const auto& input : tensors(step)) inputs.push_back(input);
    const auto results = model.run(inputs);
    const auto outputs = results.size() - state.size();  // the model's outputs, and behind them the new state
    state.assign(results.begin() + outputs, results.end());
    std::cout << results[0].to(at::kDouble).abs().sum().item<double>() << " " << state[hits].item<int64_t>() << "\n";
  }
}
