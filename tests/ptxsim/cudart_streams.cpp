// A stand-in for libcudart: streams, events and graphs.
//
// Work runs when it is submitted, whatever the stream: a missing wait between streams is not seen. A capture records
// the work of its stream, and of streams that wait for its events, and a graph repeats it in the order of the
// recording.
#include <chrono>
#include <cstdlib>
#include <map>
#include <mutex>
#include <vector>

#include "cudart.hpp"

using namespace ptxsim;

namespace {
struct Graph {
  std::vector<std::function<cudaError_t()>> work;
};
struct Event {
  double milliseconds = 0;
  Graph* graph = nullptr;  // of the capture in which it was recorded
};
std::mutex capture_mutex;
std::map<cudaStream_t, Graph*> captures;  // the graph that each captured stream goes to
std::map<cudaStream_t, Graph*> origins;   // the streams on which captures began

Graph* capture_of(cudaStream_t stream) {
  std::lock_guard<std::mutex> lock(capture_mutex);
  auto i = captures.find(stream);
  return i == captures.end() ? nullptr : i->second;
}
double now() {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}
}  // namespace

namespace ptxsim {
cudaError_t submit(cudaStream_t stream, std::function<cudaError_t()> work) {
  Graph* graph = capture_of(stream);
  if (!graph) return work();
  graph->work.push_back(std::move(work));
  return cudaSuccess;
}
bool capturing() {
  std::lock_guard<std::mutex> lock(capture_mutex);
  return !captures.empty();
}
}  // namespace ptxsim

extern "C" {
// ---- streams
cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  *stream = (cudaStream_t)malloc(8);
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return cudaStreamCreate(stream); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) { return cudaStreamCreate(stream); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  free(stream);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return capture_of(stream) ? fail(cudaErrorStreamCaptureUnsupported) : last_error();
}
cudaError_t cudaStreamQuery(cudaStream_t stream) { return cudaStreamSynchronize(stream); }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  if (Graph* graph = ((Event*)event)->graph) {
    std::lock_guard<std::mutex> lock(capture_mutex);
    captures[stream] = graph;
  }
  return cudaSuccess;
}
cudaError_t cudaStreamGetDevice(cudaStream_t, int* device) {
  *device = 0;
  return cudaSuccess;
}

// ---- events
cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = (cudaEvent_t) new Event();
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return cudaEventCreate(event); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete (Event*)event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  *(Event*)event = {now(), capture_of(stream)};
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  return ((Event*)event)->graph ? fail(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) { return cudaEventSynchronize(event); }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  *milliseconds = ((Event*)end)->milliseconds - ((Event*)start)->milliseconds;
  return cudaSuccess;
}

// ---- graphs
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  std::lock_guard<std::mutex> lock(capture_mutex);
  if (!stream || captures.count(stream)) return fail(cudaErrorStreamCaptureUnsupported);
  captures[stream] = origins[stream] = new Graph();
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  std::lock_guard<std::mutex> lock(capture_mutex);
  auto origin = origins.find(stream);
  if (origin == origins.end()) return fail(cudaErrorStreamCaptureUnmatched);
  Graph* captured = origin->second;
  for (auto i = captures.begin(); i != captures.end();) i = i->second == captured ? captures.erase(i) : std::next(i);
  origins.erase(origin);
  *graph = (cudaGraph_t)captured;
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = capture_of(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  *mode = cudaStreamCaptureModeGlobal;
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  *executable = (cudaGraphExec_t) new Graph(*(Graph*)graph);
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long flags) {
  return cudaGraphInstantiate(executable, graph, flags);
}
cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  Graph* graph = (Graph*)executable;
  return submit(stream, [graph] {
    for (auto& work : graph->work)
      if (cudaError_t error = work()) return error;
    return cudaSuccess;
  });
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete (Graph*)graph;
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete (Graph*)executable;
  return cudaSuccess;
}
}
