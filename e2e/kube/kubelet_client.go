package kube

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"time"
)

// KubeletClientCA is the file with the certificate that signs what the API server shows
// to the kubelets of real nodes.
func (c *Cluster) KubeletClientCA() string { return c.path("kubelet-client-ca.crt") }

// writeKubeletClient makes what the API server shows to kubelets: one that knows
// nobody would let it do nothing.
func (c *Cluster) writeKubeletClient() error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("make the API server's key for kubelets: %w", err)
	}
	until := time.Now().Add(24 * time.Hour)
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "e2e-kubelet-client-ca"}, NotAfter: until,
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	client := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "e2e-apiserver", Organization: []string{"system:masters"}}, NotAfter: until,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return fmt.Errorf("encode the API server's key for kubelets: %w", err)
	}
	files := map[string]*pem.Block{c.path("kubelet-client.key"): {Type: "EC PRIVATE KEY", Bytes: der}}
	for path, cert := range map[string]*x509.Certificate{c.KubeletClientCA(): ca, c.path("kubelet-client.crt"): client} {
		der, err := x509.CreateCertificate(rand.Reader, cert, ca, &key.PublicKey, key)
		if err != nil {
			return fmt.Errorf("make the API server's certificate for kubelets: %w", err)
		}
		files[path] = &pem.Block{Type: "CERTIFICATE", Bytes: der}
	}
	for path, block := range files {
		if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
			return fmt.Errorf("write the API server's certificate for kubelets: %w", err)
		}
	}
	return nil
}
