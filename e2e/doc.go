// Package e2e holds stoop's end-to-end tests: the real program, alerts on a
// real FIFO, a real Kubernetes API server, and its audit log as the judge of
// what was asked for and how often.
package e2e
